#!lua flags=allow-oom
-- Move what a node held to `pending`: its queue, what was in delivery, what it had claimed.
-- KEYS  1 epoch  2 generation  3 pending  4 node  5 claimed  6 RQ queue  7 RQ intermediate  8 RQ wip
--       9 control  10 load  11 held  12 closing  13.. cached blocks, one set per tier
-- ARGV  1 token  2 highest counter seen  3 key prefix  4 node  5 mode  6 incarnation  7 cause
--       mode 'fence':   fence ARGV[6] and move everything
--            'expired': move claimed jobs whose lease has ended (held by nobody)
--            'others':  move claimed jobs of other incarnations than ARGV[6]
--            'queued':  move what nobody has claimed
-- Returns {counter, {'ok', ref, ref...}, keys dropped for their type}; {counter, {'other', incarnation}, keys} when
-- the node has another one by now (fence only). Ids that are not this node's are none of its work, whoever put
-- them there. A moved request keeps its failure count; the node is noted as excluded, and the attempt that ended
-- so in the job's field `attempts`, which keeps the newest eight, one line of JSON each. A queued id of ours whose job
-- is gone goes to `closing`, as from a claim: whether it still is its request's attempt only the leader knows.
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
tidy(KEYS[4], 'HGET', KEYS[4], '')
for _, key in ipairs({KEYS[5], KEYS[8]}) do tidy(key, 'ZSCORE', key, '') end
for _, key in ipairs({KEYS[6], KEYS[7]}) do tidy(key, 'LRANGE', key, 0, 0) end
tidy(KEYS[9], 'XRANGE', KEYS[9], '-', '+', 'COUNT', 1)
if ARGV[5] == 'fence' then
  for _, key in ipairs({KEYS[10], KEYS[11]}) do tidy(key, 'HGET', key, '') end
  for i = 13, #KEYS do tidy(KEYS[i], 'SREM', KEYS[i], '') end
end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local moved = {'ok'}
local mine = string.match(KEYS[6], '^rq:queue:(.*)$') .. '--'
-- A decode stage that was claimed may have taken what was handed over to it; one that waits has not.
local function move(id, is_claimed)
  if string.sub(id, 1, #mine) ~= mine then return end
  local job = 'rq:job:' .. id
  tidy(job, 'HGET', job, '')
  local fields = redis.call('HMGET', job, 'ref', 'excluded', 'attempts', 'exc_info')
  local ref, attempt = string.match(string.sub(id, #mine + 1), '^([ib]%d+_%d+)%-%-(%d+_%d+)$')
  if not ref then return end
  -- What was claimed is a request of ours whatever became of its job: the leader writes that anew. In a queue an id
  -- without a job may be one that was put there again, or the record of a failed attempt, put there by RQ's tools.
  if not (fields[1] or is_claimed) then
    if not fields[4] then
      redis.call('DEL', job)
      redis.call('XADD', KEYS[12], '*', 'kind', 'released', 'ref', ref, 'id', '', 'job', id, 'payload', string.format(
        '{"attempt":"%s","node":"%s","cause":"%s","message":"its job was gone"}', attempt, ARGV[4], ARGV[7]))
    end
    return
  end
  local excluded = fields[2] or ''
  if not string.find(',' .. excluded .. ',', ',' .. ARGV[4] .. ',', 1, true) then
    excluded = excluded == '' and ARGV[4] or (excluded .. ',' .. ARGV[4])
  end
  local attempts, lines = {}, (fields[3] or '') .. '\n' .. string.format(
    '{"attempt":"%s","node":"%s","cause":"%s"}', string.match(id, '[%d_]*$'), ARGV[4], ARGV[7])
  for line in string.gmatch(lines, '[^\n]+') do attempts[#attempts + 1] = line end
  redis.call('ZREM', KEYS[8], id .. ':flexlb')
  if redis.call('EXISTS', job) == 1 then
    redis.call('RENAME', job, ARGV[3] .. 'pending:' .. ref)
    redis.call('PERSIST', ARGV[3] .. 'pending:' .. ref)
  end
  redis.call('HSET', ARGV[3] .. 'pending:' .. ref, 'ref', ref, 'status', 'scheduled', 'excluded', excluded, 'cause', ARGV[7],
    'attempts', table.concat(attempts, '\n', math.max(1, #attempts - 7)))
  if is_claimed then redis.call('HDEL', ARGV[3] .. 'pending:' .. ref, 'transfer') end
  redis.call('ZADD', KEYS[3], now, ref)
  moved[#moved + 1] = ref
end
if ARGV[5] == 'fence' then
  local incarnation = redis.call('HGET', KEYS[4], 'incarnation')
  if incarnation and incarnation ~= ARGV[6] then
    return {redis.call('HINCRBY', KEYS[2], 'counter', 1), {'other', incarnation}, strange}
  end
  redis.call('HSET', KEYS[4], 'incarnation', ARGV[6], 'fenced', ARGV[6])
  redis.call('PEXPIRE', KEYS[4], 3600000)
  redis.call('XADD', KEYS[9], 'MAXLEN', '~', 1000, '*', 'kind', 'fence', 'job', '')
  redis.call('PEXPIRE', KEYS[9], 3600000)
  for _, list in ipairs({KEYS[7], KEYS[6]}) do
    for _, id in ipairs(redis.call('LRANGE', list, 0, -1)) do move(id) end
    redis.call('DEL', list)
  end
  for _, id in ipairs(redis.call('ZRANGE', KEYS[5], 0, -1)) do
    redis.call('ZREM', KEYS[5], id)
    move(id, true)
  end
  for _, member in ipairs(redis.call('ZRANGE', KEYS[8], 0, -1)) do
    move(string.match(member, '^(.*):[^:]*$') or member, true)
    redis.call('ZREM', KEYS[8], member)
  end
elseif ARGV[5] == 'queued' then
  for _, list in ipairs({KEYS[7], KEYS[6]}) do
    for _, id in ipairs(redis.call('LRANGE', list, 0, -1)) do move(id) end
    redis.call('DEL', list)
  end
elseif ARGV[5] == 'expired' then
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[5], '-inf', now)) do
    redis.call('ZREM', KEYS[5], id)
    move(id, true)
  end
else
  for _, id in ipairs(redis.call('ZRANGE', KEYS[5], 0, -1)) do
    tidy('rq:job:' .. id, 'HGET', 'rq:job:' .. id, '')
    if redis.call('HGET', 'rq:job:' .. id, 'incarnation') ~= ARGV[6] then
      redis.call('ZREM', KEYS[5], id)
      move(id, true)
    end
  end
end
return {redis.call('HINCRBY', KEYS[2], 'counter', 1), moved, strange}
