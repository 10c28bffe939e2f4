#!lua flags=allow-oom
-- Prolong the leader lock.
-- KEYS  1 leader  2 epoch  3 renewals
-- ARGV  1 token  2 ttl ms
-- Returns {1 when this token leads for another TTL, 0 when it is deposed; epoch ms by the server's clock}. An expired
-- lock is taken again while no newer epoch exists.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return {0, now} end
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return {0, now} end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('INCR', KEYS[3])
return {1, now}
