#!lua flags=allow-oom
-- Begin or renew the registration of a node's incarnation.
-- KEYS  1 node  2 load  3 held  4 RQ worker  5.. cached blocks, one set per tier
-- ARGV  1 incarnation  2 identity (JSON)  3 heartbeat ttl ms  4 node ttl ms  5 now (ISO 8601)
--       6 queue  7 RQ worker ttl s  8 reports stream  9 generation
--       10 held jobs h   h x (job id, envelope, data)
-- What belongs to the whole pool is no KEYS: an ACL gives those to be read and written, or not at all.
-- Returns {'ok', generation id, epoch ms by the server's clock}; {'busy', other incarnation, ms until its heartbeat expires};
-- {'fenced'} when this incarnation was fenced: register with a new one.
-- The inventory (held jobs) matters only after a loss of Redis data: the leader adopts from it.
local known = redis.call('HMGET', KEYS[1], 'incarnation', 'fenced')
if known[2] == ARGV[1] then return {'fenced'} end
if known[1] and known[1] ~= ARGV[1] and known[2] ~= known[1] then
  local left = redis.call('PTTL', KEYS[2])
  if left > 0 and redis.call('HGET', KEYS[2], 'incarnation') == known[1] then
    return {'busy', known[1], left}
  end
end
if known[1] ~= ARGV[1] then
  redis.call('HDEL', KEYS[1], 'fenced', 'claim_seq', 'blocks_seq')
  redis.call('DEL', unpack(KEYS, 5))
end
redis.call('HSET', KEYS[1], 'incarnation', ARGV[1], 'identity', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('DEL', KEYS[3])
local at = 11
for _ = 1, tonumber(ARGV[10]) do
  redis.call('HSET', KEYS[3], ARGV[at], ARGV[at + 1] .. '\n' .. ARGV[at + 2])
  at = at + 3
end
redis.call('PEXPIRE', KEYS[3], 60000)
redis.call('HSET', KEYS[2], 'incarnation', ARGV[1], 'report', '')
redis.call('PEXPIRE', KEYS[2], ARGV[3])
redis.call('HSET', KEYS[4], 'birth', ARGV[5], 'last_heartbeat', ARGV[5], 'queues', ARGV[6], 'state', 'busy',
  'version', '3', 'hostname', '', 'pid', '0')
redis.call('EXPIRE', KEYS[4], ARGV[7])
redis.call('XADD', ARGV[8], 'MAXLEN', '~', 20000, '*', 'kind', 'register', 'body', ARGV[2])
local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
return {'ok', redis.call('HGET', ARGV[9], 'id') or '', now_ms}
