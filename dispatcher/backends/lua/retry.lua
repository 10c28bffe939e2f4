#!lua flags=allow-oom
-- Put failed or released attempts back to `pending`, as the retry decision said.
-- KEYS  1 epoch  2 generation  3 pending  4 closing
-- ARGV  1 token  2 highest counter seen  3 key prefix  4 items n
--       n x (closing entry id, job id, ref, not-before epoch ms, failures, excluded nodes, cause,
--            failed attempt in JSON)
-- The job's field `attempts` keeps the newest eight failed attempts, one line each.
-- Returns {the generation's counter, one answer per item}: 'ok', 'already' (the closing entry is gone), 'missing' (no job hash:
-- the entry stays, so that the request is not forgotten).
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return redis.error_reply('DEPOSED a newer epoch exists')
end
if tonumber(redis.call('HGET', KEYS[2], 'counter') or '0') < tonumber(ARGV[2]) then
  return redis.error_reply('REWOUND Redis went back in time')
end
local at = 5
local answers = {}
for i = 1, tonumber(ARGV[4]) do
  local entry, job, ref = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local not_before, failures, excluded, cause = ARGV[at + 3], ARGV[at + 4], ARGV[at + 5], ARGV[at + 6]
  local attempt = ARGV[at + 7]
  at = at + 8
  if #redis.call('XRANGE', KEYS[4], entry, entry) == 0 then
    answers[i] = 'already'
  elseif redis.call('EXISTS', 'rq:job:' .. job) == 0 then
    answers[i] = 'missing'
  else
    redis.call('XDEL', KEYS[4], entry)
    local key = ARGV[3] .. 'pending:' .. ref
    redis.call('RENAME', 'rq:job:' .. job, key)
    redis.call('PERSIST', key)
    local attempts, lines = {}, (redis.call('HGET', key, 'attempts') or '') .. '\n' .. attempt
    for line in string.gmatch(lines, '[^\n]+') do attempts[#attempts + 1] = line end
    redis.call('HSET', key, 'status', 'scheduled', 'failures', failures, 'excluded', excluded, 'cause', cause,
      'attempts', table.concat(attempts, '\n', math.max(1, #attempts - 7)))
    redis.call('ZADD', KEYS[3], not_before, ref)
    answers[i] = 'ok'
  end
end
return {redis.call('HINCRBY', KEYS[2], 'counter', 1), answers}
