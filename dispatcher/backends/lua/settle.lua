#!lua flags=allow-oom
-- Drop closing entries whose outcomes are committed to Kafka, and note how far `outcomes` is settled.
-- KEYS  1 epoch  2 generation  3 closing  4 settled
-- ARGV  1 token  2 highest counter seen  3 now (ISO 8601, for RQ)  4 positions p  p x (partition, offset)
--       then n x (entry id, job id or '', text for RQ's failed registry or '')
--       a job id is given for failed attempts, whose hash still exists
-- Returns {the generation's counter, the number of entries dropped, job keys dropped for their type}.
-- Error REWOUND also when an entry is missing and this is no repeated call (the positions are not noted
-- yet): Redis lost what was just published, and noting the positions would hide that from the next leader.
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
-- RQ's failed registry shows a record of each failed attempt under its job id: no copy of the request, so that
-- neither a claim nor a requeue can take it for one. Kept: the newest 200 of a node, for a day.
local function record_failure(job, error, now_iso, known)
  local queue = string.match(job, '^(.*)%-%-[^-]*%-%-[^-]*$')
  local ref, attempt = string.match(job, '%-%-([^-]*)%-%-([^-]*)$')
  local key, registry = 'rq:job:' .. job, 'rq:failed:' .. queue
  local seconds = tonumber(redis.call('TIME')[1])
  redis.call('HSET', key, 'status', 'failed', 'origin', queue, 'exc_info', error, 'meta', '{}', 'timeout', '86400',
    'result_ttl', '0', 'failure_ttl', '86400', 'description', 'flexlb ' .. ref .. ' attempt ' .. attempt .. ' failed',
    'data', '["workers_agent.rq_job.execute",null,[{"ref":"' .. ref .. '"}],{}]', 'ended_at', now_iso,
    'created_at', known[1] or now_iso, 'enqueued_at', known[2] or '', 'started_at', known[3] or '',
    'worker_name', queue)
  redis.call('PEXPIRE', key, 86400000)
  redis.call('ZADD', registry, seconds + 86400, job)
  redis.call('PEXPIRE', registry, 86400000)
  for _, old in ipairs(redis.call('ZRANGE', registry, 0, -201)) do
    redis.call('ZREM', registry, old)
    -- Ids of others, whoever put them there, are not ours to look at.
    local is_ours = string.sub(old, 1, #queue + 2) == queue .. '--'
    if is_ours and type(redis.pcall('HGET', 'rq:job:' .. old, 'envelope')) ~= 'string' then redis.call('DEL', 'rq:job:' .. old) end
  end
end
local positions = tonumber(ARGV[4])
local noted = true
for i = 1, positions do
  noted = noted and redis.call('HGET', KEYS[4], ARGV[3 + 2 * i]) == ARGV[4 + 2 * i]
end
local first = 5 + 2 * positions
if not noted then
  for i = first, #ARGV, 3 do
    if #redis.call('XRANGE', KEYS[3], ARGV[i], ARGV[i]) == 0 then
      return redis.error_reply('REWOUND a published entry is missing')
    end
  end
end
for i = 1, positions do
  redis.call('HSET', KEYS[4], ARGV[3 + 2 * i], ARGV[4 + 2 * i])
end
local dropped = 0
for i = first, #ARGV, 3 do
  dropped = dropped + redis.call('XDEL', KEYS[3], ARGV[i])
  local job, error = ARGV[i + 1], ARGV[i + 2]
  if job ~= '' then
    tidy('rq:job:' .. job, 'HGET', 'rq:job:' .. job, '')
    local known = redis.call('HMGET', 'rq:job:' .. job, 'created_at', 'enqueued_at', 'started_at')
    redis.call('DEL', 'rq:job:' .. job)
    if error ~= '' then record_failure(job, error, ARGV[3], known) end
  end
end
return {redis.call('HINCRBY', KEYS[2], 'counter', 1), dropped, strange}
