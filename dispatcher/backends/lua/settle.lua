#!lua flags=allow-oom
-- Drop closing entries whose outcomes are committed to Kafka, and note how far `outcomes` is settled.
-- KEYS  1 epoch  2 generation  3 closing  4 settled
-- ARGV  1 token  2 highest counter seen  3 positions p  p x (partition, offset)
--       then n x (entry id, job id or '')
--       a job id is given for failed attempts, whose hash still exists
-- Returns {the generation's counter, the number of entries dropped}.
-- Error REWOUND also when an entry is missing and this is no repeated call (the positions are not noted
-- yet): Redis lost what was just published, and noting the positions would hide that from the next leader.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return redis.error_reply('DEPOSED a newer epoch exists')
end
if tonumber(redis.call('HGET', KEYS[2], 'counter') or '0') < tonumber(ARGV[2]) then
  return redis.error_reply('REWOUND Redis went back in time')
end
local positions = tonumber(ARGV[3])
local noted = true
for i = 1, positions do
  noted = noted and redis.call('HGET', KEYS[4], ARGV[2 + 2 * i]) == ARGV[3 + 2 * i]
end
local first = 4 + 2 * positions
if not noted then
  for i = first, #ARGV, 2 do
    if #redis.call('XRANGE', KEYS[3], ARGV[i], ARGV[i]) == 0 then
      return redis.error_reply('REWOUND a published entry is missing')
    end
  end
end
for i = 1, positions do
  redis.call('HSET', KEYS[4], ARGV[2 + 2 * i], ARGV[3 + 2 * i])
end
local dropped = 0
for i = first, #ARGV, 2 do
  dropped = dropped + redis.call('XDEL', KEYS[3], ARGV[i])
  if ARGV[i + 1] ~= '' then redis.call('DEL', 'rq:job:' .. ARGV[i + 1]) end
end
return {redis.call('HINCRBY', KEYS[2], 'counter', 1), dropped}
