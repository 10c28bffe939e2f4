#!lua flags=allow-oom
-- Move what a node held to `pending`: its queue, what was in delivery, what it had claimed.
-- KEYS  1 epoch  2 pending  3 node  4 claimed  5 RQ queue  6 RQ intermediate  7 RQ wip  8 control
-- ARGV  1 token  2 key prefix  3 node  4 mode  5 incarnation  6 cause
--       mode 'fence':   fence ARGV[5] and move everything
--            'expired': move claimed jobs whose lease has ended (held by nobody)
--            'others':  move claimed jobs of other incarnations than ARGV[5]
-- Returns {'ok', ref, ref...}; {'other', incarnation} when the node has another incarnation by now
-- (fence only). A moved request keeps its failure count; the node is noted as excluded.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return redis.error_reply('DEPOSED a newer epoch exists')
end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local moved = {'ok'}
local function move(id)
  local job = 'rq:job:' .. id
  local fields = redis.call('HMGET', job, 'ref', 'excluded')
  local ref = fields[1]
  if not ref then return end
  local excluded = fields[2] or ''
  if not string.find(',' .. excluded .. ',', ',' .. ARGV[3] .. ',', 1, true) then
    excluded = excluded == '' and ARGV[3] or (excluded .. ',' .. ARGV[3])
  end
  redis.call('ZREM', KEYS[7], id .. ':flexlb')
  redis.call('RENAME', job, ARGV[2] .. 'pending:' .. ref)
  redis.call('HSET', ARGV[2] .. 'pending:' .. ref, 'status', 'scheduled', 'excluded', excluded, 'cause', ARGV[6])
  redis.call('ZADD', KEYS[2], now, ref)
  moved[#moved + 1] = ref
end
if ARGV[4] == 'fence' then
  local incarnation = redis.call('HGET', KEYS[3], 'incarnation')
  if incarnation and incarnation ~= ARGV[5] then return {'other', incarnation} end
  redis.call('HSET', KEYS[3], 'incarnation', ARGV[5], 'fenced', ARGV[5])
  redis.call('PEXPIRE', KEYS[3], 3600000)
  redis.call('XADD', KEYS[8], 'MAXLEN', '~', 1000, '*', 'kind', 'fence', 'job', '')
  redis.call('PEXPIRE', KEYS[8], 3600000)
  for _, list in ipairs({KEYS[6], KEYS[5]}) do
    for _, id in ipairs(redis.call('LRANGE', list, 0, -1)) do move(id) end
    redis.call('DEL', list)
  end
  for _, id in ipairs(redis.call('ZRANGE', KEYS[4], 0, -1)) do
    redis.call('ZREM', KEYS[4], id)
    move(id)
  end
  for _, member in ipairs(redis.call('ZRANGE', KEYS[7], 0, -1)) do
    move(string.match(member, '^(.*):[^:]*$') or member)
    redis.call('ZREM', KEYS[7], member)
  end
elseif ARGV[4] == 'expired' then
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', now)) do
    redis.call('ZREM', KEYS[4], id)
    move(id)
  end
else
  for _, id in ipairs(redis.call('ZRANGE', KEYS[4], 0, -1)) do
    if redis.call('HGET', 'rq:job:' .. id, 'incarnation') ~= ARGV[5] then
      redis.call('ZREM', KEYS[4], id)
      move(id)
    end
  end
end
return moved
