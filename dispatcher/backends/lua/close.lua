#!lua flags=allow-oom
-- Decide endings that the leader makes itself (Rejected, Evicted, Cancelled, dead, coalesced).
-- KEYS  1 epoch  2 generation  3 marks  4 pending  5 closing
-- ARGV  1 token  2 highest counter seen  3 key prefix  4 pool  5 id window ms  6 items n
--       n x (place 'log'|'pending'|'job'|'lost', ref, source, offset, node, job id, kind, request id, payload,
--            identity key, fingerprint)
--       kind is 'outcome' (payload: the outcome), 'dead' (payload: outcome, newline, dead letter) or
--       'none' (a duplicate that is coalesced with its first: the mark moves, nothing is published).
--       place 'lost': as 'job', and when it was taken but is nowhere any more: other hands deleted its hash, or the list
--       in which it stood. Nothing is removed then that entitled it: a repeated call finds its entry in `closing`.
--       identity '' leaves the (tenant, id) unclaimed (a refused duplicate must not own it).
-- Returns {the generation's counter, one answer per item, keys of nodes dropped for their type}: 'ok', 'already' (decided before or not in that place any more),
-- or 'dup|<ref>|<print>' when (tenant, id) belongs to another record.
-- Each ending is entitled by removing the entry that proves the request is where the caller saw it.
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
local prefix, pool, window = ARGV[3], ARGV[4], ARGV[5]
-- Whether this attempt may wait in `closing`: ended, or without its job given back. When that holds too many to look
-- through, one that has its job may.
local function may_be_closing(job, is_there)
  local entries = redis.call('XRANGE', KEYS[5], '-', '+', 'COUNT', 1001)
  for _, entry in ipairs(entries) do
    local found = {}
    for i = 1, #entry[2], 2 do found[entry[2][i]] = entry[2][i + 1] end
    if found.job == job and (is_there or found.kind == 'released') then return true end
  end
  return is_there and #entries > 1000
end
-- Whether this very ending waits in `closing`: of its newest 1000, as a call is repeated soon.
local function is_appended(ref, kind, payload)
  for _, entry in ipairs(redis.call('XREVRANGE', KEYS[5], '+', '-', 'COUNT', 1000)) do
    local found = {}
    for i = 1, #entry[2], 2 do found[entry[2][i]] = entry[2][i + 1] end
    if found.ref == ref and found.kind == kind and found.payload == payload then return true end
  end
  return false
end
local at = 7
local answers = {}
for i = 1, tonumber(ARGV[6]) do
  local place, ref, source, offset = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  local node, job, kind, id, payload = ARGV[at + 4], ARGV[at + 5], ARGV[at + 6], ARGV[at + 7], ARGV[at + 8]
  local identity, print = ARGV[at + 9], ARGV[at + 10]
  at = at + 11
  local answer, is_repeated = 'already', false
  if place == 'log' then
    local above = prefix .. 'above:' .. source
    local low = tonumber(redis.call('HGET', KEYS[3], source) or '0')
    if tonumber(offset) >= low and not redis.call('ZSCORE', above, offset) then
      local owner = identity ~= '' and redis.call('GET', identity)
      if owner and string.match(owner, '^[^|]*') ~= ref then
        answer = 'dup|' .. owner
      else
        if identity ~= '' then redis.call('SET', identity, ref .. '|' .. print, 'PX', window) end
        redis.call('ZADD', above, offset, offset)
        answer = 'ok'
      end
    end
  elseif place == 'pending' then
    if redis.call('ZREM', KEYS[4], ref) == 1 then
      redis.call('DEL', prefix .. 'pending:' .. ref)
      answer = 'ok'
    end
  else
    local queue = pool .. '--' .. node
    local node_key, lists = prefix .. 'node:' .. node, {'rq:queue:' .. queue, 'rq:queue:' .. queue .. ':intermediate'}
    tidy('rq:job:' .. job, 'HGET', 'rq:job:' .. job, '')
    for _, key in ipairs({node_key .. ':claimed', 'rq:wip:' .. queue}) do tidy(key, 'ZSCORE', key, '') end
    for _, key in ipairs(lists) do tidy(key, 'LRANGE', key, 0, 0) end
    tidy(node_key .. ':control', 'XRANGE', node_key .. ':control', '-', '+', 'COUNT', 1)
    -- A mere record of a failed attempt, which RQ's tools may have put into the queue, is no place.
    local is_there = redis.call('HGET', 'rq:job:' .. job, 'envelope')
    if redis.call('ZREM', node_key .. ':claimed', job) == 1 then
      redis.call('XADD', node_key .. ':control', 'MAXLEN', '~', 1000, '*', 'kind', 'cancel', 'job', job)
      redis.call('PEXPIRE', node_key .. ':control', 3600000)
      answer = 'ok'
    elseif is_there and (redis.call('LREM', lists[1], 1, job) == 1
        or redis.call('LREM', lists[2], 1, job) == 1
        or redis.call('ZREM', 'rq:failed:' .. queue, job) == 1) then
      answer = 'ok'
    elseif place == 'lost' then
      local low = tonumber(redis.call('HGET', KEYS[3], source) or '0')
      local taken = tonumber(offset) < low or redis.call('ZSCORE', prefix .. 'above:' .. source, offset)
      if taken and not redis.call('ZSCORE', KEYS[4], ref) then
        if not may_be_closing(job, is_there) then
          answer, is_repeated = 'ok', is_appended(ref, kind, payload)
        end
      end
    end
    if answer == 'ok' then
      redis.call('ZREM', 'rq:wip:' .. queue, job .. ':flexlb')
      redis.call('DEL', 'rq:job:' .. job)
    end
  end
  if answer == 'ok' and kind ~= 'none' and not is_repeated then
    redis.call('XADD', KEYS[5], '*', 'kind', kind, 'ref', ref, 'id', id, 'job', job, 'payload', payload)
  end
  answers[i] = answer
end
return {redis.call('HINCRBY', KEYS[2], 'counter', 1), answers, strange}
