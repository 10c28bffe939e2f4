#!lua flags=allow-oom
-- After a loss of Redis data: accept that an agent still runs an attempt, instead of running it again.
-- KEYS  1 epoch  2 generation  3 node  4 claimed  5 marks  6 RQ wip
-- ARGV  1 token  2 highest counter seen  3 key prefix  4 incarnation  5 lease ms  6 now (ISO 8601)
--       7 queue  8 id window ms  9 items n
--       n x (job id, ref, source, offset, cost, identity key, fingerprint, envelope, data)
-- Returns {the generation's counter, one answer per item}: 'ok' (also when repeated), 'already' (taken
-- otherwise) or 'gone' (not that incarnation); and keys dropped for their type.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return redis.error_reply('DEPOSED a newer epoch exists')
end
if tonumber(redis.call('HGET', KEYS[2], 'counter') or '0') < tonumber(ARGV[2]) then
  return redis.error_reply('REWOUND Redis went back in time')
end
-- Keys of a node are its agent's to write: one of another type than ours counts as empty, and is dropped.
local strange = {}
local function tidy(key, ...)
  local found = redis.pcall(...)
  if type(found) == 'table' and found.err and string.find(found.err, 'WRONGTYPE', 1, true) then
    redis.call('DEL', key)
    strange[#strange + 1] = key
  end
end
tidy(KEYS[3], 'HGET', KEYS[3], '')
for _, key in ipairs({KEYS[4], KEYS[6]}) do tidy(key, 'ZSCORE', key, '') end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local known = redis.call('HMGET', KEYS[3], 'incarnation', 'fenced')
local alive = known[1] == ARGV[4] and known[2] ~= ARGV[4]
local at = 10
local answers = {}
for i = 1, tonumber(ARGV[9]) do
  local job, ref, source, offset, cost = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
  local identity, print, envelope, data = ARGV[at + 5], ARGV[at + 6], ARGV[at + 7], ARGV[at + 8]
  at = at + 9
  local above = ARGV[3] .. 'above:' .. source
  local low = tonumber(redis.call('HGET', KEYS[5], source) or '0')
  if not alive then
    answers[i] = 'gone'
  elseif tonumber(offset) < low or redis.call('ZSCORE', above, offset) then
    answers[i] = redis.call('ZSCORE', KEYS[4], job) and 'ok' or 'already'
  else
    redis.call('ZADD', above, offset, offset)
    redis.call('SET', identity, ref .. '|' .. print, 'PX', ARGV[8])
    tidy('rq:job:' .. job, 'HGET', 'rq:job:' .. job, '')
    redis.call('HSET', 'rq:job:' .. job, 'data', data, 'envelope', envelope, 'ref', ref, 'failures', '0',
      'excluded', '', 'created_at', ARGV[6], 'enqueued_at', ARGV[6], 'started_at', ARGV[6],
      'description', 'flexlb ' .. ref, 'timeout', '86400', 'result_ttl', '0', 'failure_ttl', '86400',
      'meta', '{}', 'status', 'started', 'origin', ARGV[7], 'worker_name', ARGV[7], 'cost', cost, 'seq', '0',
      'incarnation', ARGV[4])
    redis.call('ZADD', KEYS[4], now + tonumber(ARGV[5]), job)
    redis.call('ZADD', KEYS[6], 4102444800, job .. ':flexlb')
    answers[i] = 'ok'
  end
end
return {redis.call('HINCRBY', KEYS[2], 'counter', 1), answers, strange}
