#!lua flags=allow-oom
-- Publish a node's load: its hash, its heartbeat, and the stream that leaders follow.
-- KEYS  1 node  2 load
-- ARGV  1 incarnation  2 report (JSON)  3 heartbeat ttl ms  4 reports stream  5 generation
--       (no KEYS, as in register)
-- Returns {generation id ('' while no leader has made one), epoch ms by the server's clock}; error FENCED when this incarnation
-- is fenced, replaced or unknown.
local known = redis.call('HMGET', KEYS[1], 'incarnation', 'fenced')
if known[1] ~= ARGV[1] or known[2] == ARGV[1] then
  return redis.error_reply('FENCED this incarnation is ' .. (known[1] and 'fenced' or 'unknown'))
end
redis.call('HSET', KEYS[2], 'incarnation', ARGV[1], 'report', ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
redis.call('XADD', ARGV[4], 'MAXLEN', '~', 20000, '*', 'kind', 'report', 'body', ARGV[2])
local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
return {redis.call('HGET', ARGV[5], 'id') or '', now_ms}
