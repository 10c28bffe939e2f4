#!lua flags=allow-oom
-- After a loss of Redis data: note again which record a (tenant, id) belongs to.
-- KEYS  1 epoch
-- ARGV  1 token  2 id window ms  n x (identity key, '<ref>|<fingerprint>')
-- Returns 1.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return redis.error_reply('DEPOSED a newer epoch exists')
end
for i = 3, #ARGV, 2 do
  redis.call('SET', ARGV[i], ARGV[i + 1], 'NX', 'PX', ARGV[2])
end
return 1
