#!lua flags=allow-oom
-- Put attempts that ended without an outcome back to `pending`: failed and released ones as the retry decision said,
-- prefill stages with what they hand over to the decode stage.
-- KEYS  1 epoch  2 generation  3 pending  4 closing
-- ARGV  1 token  2 highest counter seen  3 key prefix  4 now (ISO 8601, for RQ)  5 items n
--       n x (closing entry id, job id, ref, not-before epoch ms, failures, excluded nodes, crashed nodes, cause,
--            failed attempt in JSON or '', text for RQ's failed registry or '', hand-off or '')
-- The job's field `attempts` keeps the newest eight failed attempts, one line each.
-- Returns {the generation's counter, one answer per item, job keys dropped for their type}: 'ok', 'already' (the closing
-- entry is gone), 'missing' (as ok, but its job was gone: what is pending now has to be written anew from its record).
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
local at = 6
local answers = {}
for i = 1, tonumber(ARGV[5]) do
  local entry, job, ref = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local not_before, failures, excluded, crashed = ARGV[at + 3], ARGV[at + 4], ARGV[at + 5], ARGV[at + 6]
  local cause, attempt, error = ARGV[at + 7], ARGV[at + 8], ARGV[at + 9]
  local handoff = ARGV[at + 10]
  at = at + 11
  tidy('rq:job:' .. job, 'HGET', 'rq:job:' .. job, '')
  if #redis.call('XRANGE', KEYS[4], entry, entry) == 0 then
    answers[i] = 'already'
  else
    redis.call('XDEL', KEYS[4], entry)
    local key = ARGV[3] .. 'pending:' .. ref
    answers[i] = 'missing'
    if redis.call('EXISTS', 'rq:job:' .. job) == 1 then
      redis.call('RENAME', 'rq:job:' .. job, key)
      redis.call('PERSIST', key)
      answers[i] = 'ok'
    end
    local attempts, lines = {}, (redis.call('HGET', key, 'attempts') or '') .. '\n' .. attempt
    for line in string.gmatch(lines, '[^\n]+') do attempts[#attempts + 1] = line end
    redis.call('HSET', key, 'ref', ref, 'status', 'scheduled', 'failures', failures, 'excluded', excluded, 'crashed', crashed,
      'cause', cause, 'attempts', table.concat(attempts, '\n', math.max(1, #attempts - 7)))
    if handoff ~= '' then redis.call('HSET', key, 'transfer', handoff) else redis.call('HDEL', key, 'transfer') end
    redis.call('ZADD', KEYS[3], not_before, ref)
    if error ~= '' then
      record_failure(job, error, ARGV[4], redis.call('HMGET', key, 'created_at', 'enqueued_at', 'started_at'))
    end
  end
end
return {redis.call('HINCRBY', KEYS[2], 'counter', 1), answers, strange}
