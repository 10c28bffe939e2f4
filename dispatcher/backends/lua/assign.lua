#!lua
-- Bind a batch of requests to nodes: fence, drop duplicates, push RQ jobs, advance *assigned* marks.
-- KEYS  1 epoch  2 generation  3 marks  4 pending  5 cordons
-- ARGV  1 token  2 highest counter seen  3 key prefix  4 pool  5 now (ISO 8601, for RQ)  6 id window ms
--       7 marks m  8 items n   m x (source, low)
--       n x (place 'log'|'pending', node, incarnation, job id, ref, source, offset, cost tokens,
--            identity key, fingerprint, data, envelope, predicted cached tokens, stage)
-- Error REWOUND when the counter is lower than one seen before: Redis went back in time, and marks computed
-- before that must not be written.
-- Returns {the generation's counter, one answer per item, one assignment number per item, keys dropped}:
--   'ok'                  pushed
--   'already'             it is in Redis or was: success for a repeated call
--   'gone'                the node is fenced, has another incarnation or keys that are none of ours: choose again
--   'misread'             its job in `pending` is gone, or lacks its request: to be written anew there
--   'cordoned'            an operator wants nothing new there: choose again
--   'dup|<ref>|<print>'   its (tenant, id) belongs to another record
-- Deliberately without allow-oom: at maxmemory nothing new is bound, so that work can end.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return redis.error_reply('DEPOSED a newer epoch exists')
end
if tonumber(redis.call('HGET', KEYS[2], 'counter') or '0') < tonumber(ARGV[2]) then
  return redis.error_reply('REWOUND Redis went back in time')
end
local prefix, pool, now, window = ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local marks, items = tonumber(ARGV[7]), tonumber(ARGV[8])
local at = 9 + 2 * marks
local answers, numbers = {}, {}
-- Keys of a node are its agent's to write: one that is not what ours is counts as empty, and is dropped.
local strange = {}
local function unless_strange(key, answer)
  if type(answer) ~= 'table' or not answer.err then return answer end
  if not (string.find(answer.err, 'WRONGTYPE', 1, true) or string.find(answer.err, 'integer', 1, true)
      or string.find(answer.err, 'overflow', 1, true)) then
    error(answer.err)
  end
  redis.call('DEL', key)
  strange[#strange + 1] = key
end
-- First of all that an item changes: the assignment's number, nil when the node can't be given the job.
local function push(node_key, queue, job)
  local seq = unless_strange(node_key, redis.pcall('HINCRBY', node_key, 'seq', 1))
  local key = 'rq:queue:' .. queue
  return seq and unless_strange(key, redis.pcall('RPUSH', key, job)) and seq
end
local any_cordoned = redis.call('EXISTS', KEYS[5]) == 1
for i = 1, items do
  local place, node, incarnation = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local job, ref, source, offset = ARGV[at + 3], ARGV[at + 4], ARGV[at + 5], ARGV[at + 6]
  local cost, identity, print = ARGV[at + 7], ARGV[at + 8], ARGV[at + 9]
  local data, envelope, hit, stage = ARGV[at + 10], ARGV[at + 11], ARGV[at + 12], ARGV[at + 13]
  at = at + 14
  local node_key = prefix .. 'node:' .. node
  local queue = pool .. '--' .. node
  local answer = 'ok'
  local seq
  numbers[i] = 0
  local known = unless_strange(node_key, redis.pcall('HMGET', node_key, 'incarnation', 'fenced')) or {}
  if place == 'log' then
    local low = tonumber(redis.call('HGET', KEYS[3], source) or '0')
    local above = prefix .. 'above:' .. source
    if tonumber(offset) < low or redis.call('ZSCORE', above, offset) then
      answer = 'already'
    elseif known[1] ~= incarnation or known[2] == incarnation then
      answer = 'gone'
    elseif any_cordoned and redis.call('HGET', KEYS[5], node) then
      answer = 'cordoned'
    else
      local owner = redis.call('GET', identity)
      if owner and string.match(owner, '^[^|]*') ~= ref then
        answer = 'dup|' .. owner
      else
        seq = push(node_key, queue, job)
        if seq then
          redis.call('SET', identity, ref .. '|' .. print, 'PX', window)
          redis.call('ZADD', above, offset, offset)
        else
          answer = 'gone'
        end
      end
    end
  elseif not redis.call('ZSCORE', KEYS[4], ref) then
    answer = 'already'
  elseif known[1] ~= incarnation or known[2] == incarnation then
    answer = 'gone'
  elseif any_cordoned and redis.call('HGET', KEYS[5], node) then
    answer = 'cordoned'
  elseif not unless_strange(prefix .. 'pending:' .. ref, redis.pcall('HGET', prefix .. 'pending:' .. ref, 'envelope')) then
    answer = 'misread'
  else
    seq = push(node_key, queue, job)
    if not seq then
      answer = 'gone'
    else
      redis.call('ZREM', KEYS[4], ref)
      redis.call('RENAME', prefix .. 'pending:' .. ref, 'rq:job:' .. job)
      redis.call('HDEL', 'rq:job:' .. job, 'started_at', 'worker_name', 'last_heartbeat', 'ended_at')
    end
  end
  if answer == 'ok' then
    local key = 'rq:job:' .. job
    if place == 'log' then
      local function fill()
        return redis.pcall('HSET', key, 'data', data, 'envelope', envelope, 'ref', ref, 'failures', '0',
          'excluded', '', 'created_at', now, 'description', 'flexlb ' .. ref, 'timeout', '86400', 'result_ttl', '0',
          'failure_ttl', '86400', 'meta', '{}')
      end
      if not unless_strange(key, fill()) then unless_strange(key, fill()) end
    end
    redis.call('HSET', key, 'status', 'queued', 'origin', queue, 'enqueued_at', now, 'cost', cost, 'seq', seq,
      'hit', hit, 'stage', stage)
    -- What was handed over is of use to the decode stage alone.
    if stage ~= 'decode' then redis.call('HDEL', key, 'transfer') end
    numbers[i] = seq
  end
  answers[i] = answer
end
for i = 1, marks do
  local source, low = ARGV[7 + 2 * i], ARGV[8 + 2 * i]
  if tonumber(low) > tonumber(redis.call('HGET', KEYS[3], source) or '0') then
    redis.call('HSET', KEYS[3], source, low)
    redis.call('ZREMRANGEBYSCORE', prefix .. 'above:' .. source, '-inf', '(' .. low)
  end
end
return {redis.call('HINCRBY', KEYS[2], 'counter', 1), answers, numbers, strange}
