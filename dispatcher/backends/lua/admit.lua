#!lua flags=allow-oom
-- Enter a node into the sets that only the leader writes: ours and RQ's; or take it out.
-- KEYS  1 epoch  2 generation  3 nodes  4 rq:queues  5 rq:workers  6 rq:workers:<queue>
--       7 node  8 claimed  9 RQ queue  10 RQ intermediate
-- ARGV  1 token  2 highest counter seen  3 node  4 RQ queue key  5 RQ worker key  6 'admit'|'forget'
-- Returns {the generation's counter, 1}, or 0 for 1 when a node that lives or holds work was not forgotten: a new
-- leader finds the work of exactly the nodes in the set. Third: keys dropped for their type.
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
tidy(KEYS[7], 'HGET', KEYS[7], '')
local known = redis.call('HMGET', KEYS[7], 'incarnation', 'fenced')
local is_alive = known[1] and known[1] ~= known[2]
if ARGV[6] == 'forget' and (is_alive or redis.call('EXISTS', KEYS[8], KEYS[9], KEYS[10]) > 0) then
  return {redis.call('HINCRBY', KEYS[2], 'counter', 1), 0, strange}
end
local command = ARGV[6] == 'admit' and 'SADD' or 'SREM'
redis.call(command, KEYS[3], ARGV[3])
redis.call(command, KEYS[4], ARGV[4])
redis.call(command, KEYS[5], ARGV[5])
redis.call(command, KEYS[6], ARGV[5])
return {redis.call('HINCRBY', KEYS[2], 'counter', 1), 1, strange}
