#!lua flags=allow-oom
-- After a loss of Redis data: note again which record a (tenant, id) belongs to.
-- KEYS  1 epoch  2 generation
-- ARGV  1 token  2 highest counter seen  3 id window ms  n x (identity key, '<ref>|<fingerprint>')
-- Returns {the generation's counter, 1}.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return redis.error_reply('DEPOSED a newer epoch exists')
end
if tonumber(redis.call('HGET', KEYS[2], 'counter') or '0') < tonumber(ARGV[2]) then
  return redis.error_reply('REWOUND Redis went back in time')
end
for i = 4, #ARGV, 2 do
  redis.call('SET', ARGV[i], ARGV[i + 1], 'NX', 'PX', ARGV[3])
end
return {redis.call('HINCRBY', KEYS[2], 'counter', 1), 1}
