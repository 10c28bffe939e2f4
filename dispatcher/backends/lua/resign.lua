#!lua flags=allow-oom
-- Give the leader lock back, if it is ours.
-- KEYS  1 leader
-- ARGV  1 token
-- Returns 1 when it was.
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
