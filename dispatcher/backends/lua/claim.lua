#!lua flags=allow-oom
-- Take up to `limit` jobs of a node's queue into the hands of its agent.
-- KEYS  1 node  2 claimed  3 RQ queue  4 RQ intermediate  5 RQ wip  6 last claim
-- ARGV  1 incarnation  2 claim number (rising within an incarnation)  3 limit  4 lease ms
--       5 now (ISO 8601)  6 queue ('<pool>--<node>', also the worker's name)
--       7 '' or the RQ execution id when a stock RQ worker already took the job in ARGV[8]
--       9 closing (no KEYS, as in register)
-- Returns a list of {job id, seq, envelope, data, failures, predicted cached tokens, checkpoint, stage, hand-off},
-- then foreign ids as {id}: of other makers, and of mere records of failed attempts, which RQ's `requeue` puts back;
-- error FENCED as in report; {} for a claim older than the last one.
-- An id of ours whose job is gone, or lacks its request, goes to the leader as an attempt given back, with request id
-- '': whatever stood in the queue is a request, and is never in no place.
-- A job is entitled by removing its id from the list that proves it is ours to take: a frozen agent
-- wakes with an id that its blocking read had already delivered, long after it was moved elsewhere.
local known = redis.call('HMGET', KEYS[1], 'incarnation', 'fenced', 'claim_seq')
if known[1] ~= ARGV[1] or known[2] == ARGV[1] then
  return redis.error_reply('FENCED this incarnation is ' .. (known[1] and 'fenced' or 'unknown'))
end
local number, limit, queue = tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[6]
local last = tonumber(known[3] or '0')
if number < last then return {} end
local taken, foreign = {}, {}
local mine = queue .. '--'
local function give_back(id, ref, attempt)
  redis.call('DEL', 'rq:job:' .. id)
  if ARGV[7] ~= '' then redis.call('ZREM', KEYS[5], id .. ':' .. ARGV[7]) end
  redis.call('XADD', ARGV[9], '*', 'kind', 'released', 'ref', ref, 'id', '', 'job', id, 'payload', string.format(
    '{"attempt":"%s","node":"%s","cause":"lease_expired","message":"its job was gone when it was to be claimed"}',
    attempt, string.match(queue, '^.-%-%-(.*)$')))
end
local function take(id)
  local job = redis.pcall('HMGET', 'rq:job:' .. id, 'envelope', 'ref', 'exc_info')
  if job.err then
    if not string.find(job.err, 'WRONGTYPE', 1, true) then error(job.err) end
    job = {}
  end
  local ref, attempt = string.match(string.sub(id, #mine + 1), '^([ib]%d+_%d+)%-%-(%d+_%d+)$')
  if string.sub(id, 1, #mine) ~= mine or not ref then
    foreign[#foreign + 1] = {id}
  elseif job[1] then
    taken[#taken + 1] = id
  elseif job[3] and not job[2] then
    foreign[#foreign + 1] = {id}
  else
    give_back(id, ref, attempt)
  end
end
if number == last then
  for id in string.gmatch(redis.call('GET', KEYS[6]) or '', '[^ ]+') do
    if redis.call('ZSCORE', KEYS[2], id) then taken[#taken + 1] = id end
  end
else
  redis.call('HSET', KEYS[1], 'claim_seq', ARGV[2])
  local time = redis.call('TIME')
  local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
  if ARGV[7] ~= '' then
    if redis.call('ZSCORE', KEYS[5], ARGV[8] .. ':' .. ARGV[7]) and not redis.call('ZSCORE', KEYS[2], ARGV[8]) then
      take(ARGV[8])
    end
  else
    for _, id in ipairs(redis.call('LRANGE', KEYS[4], 0, limit - 1)) do
      if redis.call('LREM', KEYS[4], 1, id) == 1 then take(id) end
    end
    if #taken < limit then
      for _, id in ipairs(redis.call('LPOP', KEYS[3], limit - #taken) or {}) do take(id) end
    end
  end
  for _, id in ipairs(taken) do
    redis.call('ZADD', KEYS[2], now + tonumber(ARGV[4]), id)
    if ARGV[7] == '' then redis.call('ZADD', KEYS[5], 4102444800, id .. ':flexlb') end
    redis.call('HSET', 'rq:job:' .. id, 'status', 'started', 'started_at', ARGV[5], 'last_heartbeat', ARGV[5],
      'worker_name', queue, 'incarnation', ARGV[1])
  end
  redis.call('SET', KEYS[6], table.concat(taken, ' '), 'PX', 600000)
end
local answer = {}
for i, id in ipairs(taken) do
  local job = redis.call('HMGET', 'rq:job:' .. id, 'seq', 'envelope', 'data', 'failures', 'hit', 'checkpoint',
    'stage', 'transfer')
  answer[i] = {id, job[1], job[2], job[3], job[4], job[5], job[6], job[7], job[8]}
end
for _, id in ipairs(foreign) do answer[#answer + 1] = id end
return answer
