#!lua flags=allow-oom
-- Drop closing entries whose outcomes are committed to Kafka, and note how far `outcomes` is settled.
-- KEYS  1 epoch  2 closing  3 settled
-- ARGV  1 token  2 positions p  p x (partition, offset)  then n x (entry id, job id or '')
--       a job id is given for failed attempts, whose hash still exists
-- Returns the number of entries dropped.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return redis.error_reply('DEPOSED a newer epoch exists')
end
local positions = tonumber(ARGV[2])
for i = 1, positions do
  redis.call('HSET', KEYS[3], ARGV[1 + 2 * i], ARGV[2 + 2 * i])
end
local dropped = 0
for i = 3 + 2 * positions, #ARGV, 2 do
  dropped = dropped + redis.call('XDEL', KEYS[2], ARGV[i])
  if ARGV[i + 1] ~= '' then redis.call('DEL', 'rq:job:' .. ARGV[i + 1]) end
end
return dropped
