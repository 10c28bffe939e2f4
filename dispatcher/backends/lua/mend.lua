#!lua flags=allow-oom
-- Move requests whose jobs can't be read to `pending`, written anew from their records.
-- KEYS  1 epoch  2 generation  3 pending
-- ARGV  1 token  2 highest counter seen  3 key prefix  4 pool  5 now (ISO 8601, for RQ)  6 items n
--       n x (node or '' when pending, job id or '', ref, envelope, data)
-- Returns {the generation's counter, one answer per item, keys of nodes dropped for their type}: 'ok' (also when
-- repeated), or 'gone' when it is neither in that place nor pending any more.
-- Entitled by removing the id from its node's lists: an agent that holds it is told to abort, and can't answer.
-- What can be read of its past is kept: failures, excluded and crashed nodes, earlier attempts, the checkpoint.
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
local prefix, pool, now_iso = ARGV[3], ARGV[4], ARGV[5]
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
-- Whether an attempt was taken from its node; its job is then the pending one.
local function take(node, job, pending)
  local queue, node_key = pool .. '--' .. node, prefix .. 'node:' .. node
  local lists = {'rq:queue:' .. queue, 'rq:queue:' .. queue .. ':intermediate'}
  local claimed, wip, control = node_key .. ':claimed', 'rq:wip:' .. queue, node_key .. ':control'
  tidy('rq:job:' .. job, 'HGET', 'rq:job:' .. job, '')
  for _, key in ipairs({claimed, wip}) do tidy(key, 'ZSCORE', key, '') end
  for _, key in ipairs(lists) do tidy(key, 'LRANGE', key, 0, 0) end
  local found = redis.call('LREM', lists[1], 0, job) + redis.call('LREM', lists[2], 0, job)
  if redis.call('ZREM', claimed, job) == 1 then
    found = found + 1
    tidy(control, 'XRANGE', control, '-', '+', 'COUNT', 1)
    redis.call('XADD', control, 'MAXLEN', '~', 1000, '*', 'kind', 'cancel', 'job', job)
    redis.call('PEXPIRE', control, 3600000)
  end
  if found == 0 then return false end
  redis.call('ZREM', wip, job .. ':flexlb')
  if redis.call('EXISTS', 'rq:job:' .. job) == 1 then
    redis.call('RENAME', 'rq:job:' .. job, pending)
    redis.call('PERSIST', pending)
  end
  return true
end
local at = 7
local answers = {}
for i = 1, tonumber(ARGV[6]) do
  local node, job, ref, envelope, data = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
  at = at + 5
  local key = prefix .. 'pending:' .. ref
  tidy(key, 'HGET', key, '')
  local is_taken = node ~= '' and take(node, job, key)
  if is_taken or redis.call('ZSCORE', KEYS[3], ref) then
    local past = redis.call('HMGET', key, 'failures', 'excluded', 'crashed', 'created_at')
    redis.call('HSET', key, 'data', data, 'envelope', envelope, 'ref', ref, 'hit', '0', 'seq', '0', 'cause', '',
      'failures', string.match(past[1] or '', '^%d%d?%d?$') or '0',
      'excluded', string.match(past[2] or '', '^[%w_,-]*$') or '',
      'crashed', string.match(past[3] or '', '^[%w_,-]*$') or '',
      'created_at', past[4] or now_iso, 'description', 'flexlb ' .. ref, 'timeout', '86400', 'result_ttl', '0',
      'failure_ttl', '86400', 'meta', '{}', 'status', 'scheduled')
    redis.call('ZADD', KEYS[3], 'NX', now, ref)
    answers[i] = 'ok'
  else
    answers[i] = 'gone'
  end
end
return {redis.call('HINCRBY', KEYS[2], 'counter', 1), answers, strange}
