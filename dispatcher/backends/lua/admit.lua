#!lua flags=allow-oom
-- Enter a node into the sets that only the leader writes: ours and RQ's; or take it out.
-- KEYS  1 epoch  2 nodes  3 rq:queues  4 rq:workers  5 rq:workers:<queue>
-- ARGV  1 token  2 node  3 RQ queue key  4 RQ worker key  5 'admit'|'forget'
-- Returns 1.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return redis.error_reply('DEPOSED a newer epoch exists')
end
local command = ARGV[5] == 'admit' and 'SADD' or 'SREM'
redis.call(command, KEYS[2], ARGV[2])
redis.call(command, KEYS[3], ARGV[3])
redis.call(command, KEYS[4], ARGV[4])
redis.call(command, KEYS[5], ARGV[4])
return 1
