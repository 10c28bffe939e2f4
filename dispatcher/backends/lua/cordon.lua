#!lua flags=allow-oom
-- Note what an operator wishes of a node, or take it back, and tell the leaders that follow.
-- KEYS  1 cordons
-- ARGV  1 node  2 wish ('cordon'|'drain', '' takes it back)  3 reports stream  4 node's key
--       (no KEYS: an ACL gives those to be read and written, or not at all)
-- Returns {'ok'|'unknown', the wish before or ''}; 'unknown': no such node within the last hour, nothing was noted.
-- Not fenced: an operator is no leader, and whoever leads obeys. assign.lua reads the same hash, so that nothing is
-- bound to the node once this has returned.
local before = redis.call('HGET', KEYS[1], ARGV[1]) or ''
if ARGV[2] == '' then
  redis.call('HDEL', KEYS[1], ARGV[1])
else
  if before == '' and redis.call('EXISTS', ARGV[4]) == 0 then
    return {'unknown', ''}
  end
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
end
redis.call('XADD', ARGV[3], 'MAXLEN', '~', 20000, '*', 'kind', 'cordon', 'body', ARGV[1])
return {'ok', before}
