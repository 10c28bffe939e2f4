#!lua flags=allow-oom
-- Start a new Redis generation, when all data are gone or went back in time: drop what is left of
-- the old one's places and lay the marks anew.
-- KEYS  1 epoch  2 generation  3 marks  4 pending  5 closing  6 nodes  7 settled
-- ARGV  1 token  2 key prefix  3 pool  4 generation id  5 marks m  m x (source, low)
--       then the sources' finished offsets above: (source, count, offset...)...
-- Returns 1. Identities of requests (id:*) are kept: they only expire.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return redis.error_reply('DEPOSED a newer epoch exists')
end
local prefix = ARGV[2]
for _, ref in ipairs(redis.call('ZRANGE', KEYS[4], 0, -1)) do
  redis.call('DEL', prefix .. 'pending:' .. ref)
end
for _, node in ipairs(redis.call('SMEMBERS', KEYS[6])) do
  local queue = ARGV[3] .. '--' .. node
  local claimed = prefix .. 'node:' .. node .. ':claimed'
  local function drop(ids)
    for _, id in ipairs(ids) do
      if string.sub(id, 1, #queue + 2) == queue .. '--' then redis.call('DEL', 'rq:job:' .. id) end
    end
  end
  -- A key of another type, which is its agent's doing, names no jobs.
  local function found(answer) return answer.err and {} or answer end
  for _, list in ipairs({'rq:queue:' .. queue, 'rq:queue:' .. queue .. ':intermediate'}) do
    drop(found(redis.pcall('LRANGE', list, 0, -1)))
    redis.call('DEL', list)
  end
  drop(found(redis.pcall('ZRANGE', claimed, 0, -1)))
  redis.call('DEL', claimed, 'rq:wip:' .. queue)
end
redis.call('DEL', KEYS[3], KEYS[4], KEYS[5], KEYS[7])
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[2], 'id', ARGV[4], 'counter', 0)
local at = 6
for _ = 1, tonumber(ARGV[5]) do
  redis.call('HSET', KEYS[3], ARGV[at], ARGV[at + 1])
  redis.call('DEL', prefix .. 'above:' .. ARGV[at])
  at = at + 2
end
while at <= #ARGV do
  local source, count = ARGV[at], tonumber(ARGV[at + 1])
  for i = 1, count do
    redis.call('ZADD', prefix .. 'above:' .. source, ARGV[at + 1 + i], ARGV[at + 1 + i])
  end
  at = at + 2 + count
end
return 1
