#!lua flags=allow-oom
-- Take the leader lock and make a new epoch, or say who holds it.
-- KEYS  1 leader  2 epoch  3 renewals
-- ARGV  1 owner (unique per try, so that a repeated call finds its own lock)  2 ttl ms
--       3 token of a leader whose lease is not waited for, or ''
-- Returns {1, epoch ms by the server's clock, token} when acquired, {0, epoch ms, token of the holder, renewals,
-- ms until its lock expires} otherwise.
-- The epoch is max(stored + 1, server ms): a plain counter collides after a failover to a replica
-- that missed the last lock. Tokens are compared whole, '<epoch>:<owner>'.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local holder = redis.call('GET', KEYS[1])
if holder then
  if string.match(holder, '^%d+:(.*)$') == ARGV[1] then
    redis.call('PEXPIRE', KEYS[1], ARGV[2])
    return {1, now, holder}
  end
  if holder ~= ARGV[3] then
    return {0, now, holder, redis.call('GET', KEYS[3]) or '0', redis.call('PTTL', KEYS[1])}
  end
end
local stored = tonumber(string.match(redis.call('GET', KEYS[2]) or '0', '^%d+')) or 0
local token = string.format('%.0f', math.max(stored + 1, now)) .. ':' .. ARGV[1]
redis.call('SET', KEYS[2], token)
redis.call('SET', KEYS[1], token, 'PX', ARGV[2])
redis.call('INCR', KEYS[3])
return {1, now, token}
