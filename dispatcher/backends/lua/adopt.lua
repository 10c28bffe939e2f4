#!lua flags=allow-oom
-- After a loss of Redis data: accept that an agent still runs an attempt, instead of running it again.
-- KEYS  1 epoch  2 node  3 claimed  4 marks  5 RQ wip
-- ARGV  1 token  2 key prefix  3 incarnation  4 lease ms  5 now (ISO 8601)  6 queue  7 id window ms
--       8 items n   n x (job id, ref, source, offset, cost, identity key, fingerprint, envelope, data)
-- Returns one answer per item: 'ok', or 'already' (taken otherwise), or 'gone' (not that incarnation).
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return redis.error_reply('DEPOSED a newer epoch exists')
end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local known = redis.call('HMGET', KEYS[2], 'incarnation', 'fenced')
local alive = known[1] == ARGV[3] and known[2] ~= ARGV[3]
local at = 9
local answers = {}
for i = 1, tonumber(ARGV[8]) do
  local job, ref, source, offset, cost = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
  local identity, print, envelope, data = ARGV[at + 5], ARGV[at + 6], ARGV[at + 7], ARGV[at + 8]
  at = at + 9
  local above = ARGV[2] .. 'above:' .. source
  local low = tonumber(redis.call('HGET', KEYS[4], source) or '0')
  if not alive then
    answers[i] = 'gone'
  elseif tonumber(offset) < low or redis.call('ZSCORE', above, offset) then
    answers[i] = 'already'
  else
    redis.call('ZADD', above, offset, offset)
    redis.call('SET', identity, ref .. '|' .. print, 'PX', ARGV[7])
    redis.call('HSET', 'rq:job:' .. job, 'data', data, 'envelope', envelope, 'ref', ref, 'failures', '0',
      'excluded', '', 'created_at', ARGV[5], 'enqueued_at', ARGV[5], 'started_at', ARGV[5],
      'description', 'flexlb ' .. ref, 'timeout', '86400', 'result_ttl', '0', 'failure_ttl', '86400',
      'meta', '{}', 'status', 'started', 'origin', ARGV[6], 'worker_name', ARGV[6], 'cost', cost, 'seq', '0',
      'incarnation', ARGV[3])
    redis.call('ZADD', KEYS[3], now + tonumber(ARGV[4]), job)
    redis.call('ZADD', KEYS[5], 4102444800, job .. ':flexlb')
    answers[i] = 'ok'
  end
end
return answers
