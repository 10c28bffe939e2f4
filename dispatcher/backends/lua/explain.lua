#!lua
-- Keep explanations of decisions: the newest few of a request, of the newest requests, for a while.
-- KEYS  1 epoch  2 explanations  3 explained
-- ARGV  1 token  2 requests kept  3 explanations kept of each  4 time kept ms  n x (digest, explanation)
-- A field holds explanations in lines, oldest first; one that is there already is not added again.
-- Returns how many were added.
-- Deliberately without allow-oom: at maxmemory nothing is explained. It moves no request and bumps no counter.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return redis.error_reply('DEPOSED a newer epoch exists')
end
local most, each, kept_ms = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local added = 0
for i = 5, #ARGV, 2 do
  local digest, line = ARGV[i], ARGV[i + 1]
  local lines = redis.call('HGET', KEYS[2], digest)
  if not lines or not string.find(lines, line, 1, true) then
    lines = lines and lines .. '\n' .. line or line
    local _, breaks = string.gsub(lines, '\n', '\n')
    for _ = each, breaks do
      lines = string.sub(lines, string.find(lines, '\n', 1, true) + 1)
    end
    redis.call('HSET', KEYS[2], digest, lines)
    added = added + 1
  end
  redis.call('ZADD', KEYS[3], now, digest)
end
-- More than a call adds, so that what has gathered goes; never so many that others wait for it.
local function drop(digests)
  if #digests > 0 then
    redis.call('HDEL', KEYS[2], unpack(digests))
    redis.call('ZREM', KEYS[3], unpack(digests))
  end
end
drop(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now - kept_ms, 'LIMIT', 0, 500))
drop(redis.call('ZRANGE', KEYS[3], 0, -most - 1))
redis.call('PEXPIRE', KEYS[2], kept_ms)
redis.call('PEXPIRE', KEYS[3], kept_ms)
return added
