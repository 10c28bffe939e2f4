#!lua flags=allow-oom
-- Enter a node into the sets that only the leader writes: ours and RQ's; or take it out.
-- KEYS  1 epoch  2 generation  3 nodes  4 rq:queues  5 rq:workers  6 rq:workers:<queue>
-- ARGV  1 token  2 highest counter seen  3 node  4 RQ queue key  5 RQ worker key  6 'admit'|'forget'
-- Returns {the generation's counter, 1}.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return redis.error_reply('DEPOSED a newer epoch exists')
end
if tonumber(redis.call('HGET', KEYS[2], 'counter') or '0') < tonumber(ARGV[2]) then
  return redis.error_reply('REWOUND Redis went back in time')
end
local command = ARGV[6] == 'admit' and 'SADD' or 'SREM'
redis.call(command, KEYS[3], ARGV[3])
redis.call(command, KEYS[4], ARGV[4])
redis.call(command, KEYS[5], ARGV[5])
redis.call(command, KEYS[6], ARGV[5])
return {redis.call('HINCRBY', KEYS[2], 'counter', 1), 1}
