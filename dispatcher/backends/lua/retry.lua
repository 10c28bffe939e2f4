#!lua flags=allow-oom
-- Put failed or released attempts back to `pending`, as the retry decision said.
-- KEYS  1 epoch  2 pending  3 closing
-- ARGV  1 token  2 key prefix  3 items n
--       n x (closing entry id, job id, ref, not-before epoch ms, failures, excluded nodes, cause)
-- Returns one answer per item: 'ok', 'already' (the closing entry is gone), 'missing' (no job hash:
-- the entry stays, so that the request is not forgotten).
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return redis.error_reply('DEPOSED a newer epoch exists')
end
local at = 4
local answers = {}
for i = 1, tonumber(ARGV[3]) do
  local entry, job, ref = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local not_before, failures, excluded, cause = ARGV[at + 3], ARGV[at + 4], ARGV[at + 5], ARGV[at + 6]
  at = at + 7
  if #redis.call('XRANGE', KEYS[3], entry, entry) == 0 then
    answers[i] = 'already'
  elseif redis.call('EXISTS', 'rq:job:' .. job) == 0 then
    answers[i] = 'missing'
  else
    redis.call('XDEL', KEYS[3], entry)
    local key = ARGV[2] .. 'pending:' .. ref
    redis.call('RENAME', 'rq:job:' .. job, key)
    redis.call('HSET', key, 'status', 'scheduled', 'failures', failures, 'excluded', excluded, 'cause', cause)
    redis.call('ZADD', KEYS[2], not_before, ref)
    answers[i] = 'ok'
  end
end
return answers
