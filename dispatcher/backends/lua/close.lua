#!lua flags=allow-oom
-- Decide endings that the leader makes itself (Rejected, Evicted, Cancelled, dead, coalesced).
-- KEYS  1 epoch  2 generation  3 marks  4 pending  5 closing
-- ARGV  1 token  2 highest counter seen  3 key prefix  4 pool  5 id window ms  6 items n
--       n x (place 'log'|'pending'|'job'|'lost', ref, source, offset, node, job id, kind, request id, payload,
--            identity key, fingerprint)
--       kind is 'outcome' (payload: the outcome), 'dead' (payload: outcome, newline, dead letter) or
--       'none' (a duplicate that is coalesced with its first: the mark moves, nothing is published).
--       place 'lost': as 'job', and when it was taken but is nowhere any more, its hash deleted by other hands.
--       identity '' leaves the (tenant, id) unclaimed (a refused duplicate must not own it).
-- Returns {the generation's counter, one answer per item}: 'ok', 'already' (decided before or not in that place any more),
-- or 'dup|<ref>|<print>' when (tenant, id) belongs to another record.
-- Each ending is entitled by removing the entry that proves the request is where the caller saw it.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return redis.error_reply('DEPOSED a newer epoch exists')
end
if tonumber(redis.call('HGET', KEYS[2], 'counter') or '0') < tonumber(ARGV[2]) then
  return redis.error_reply('REWOUND Redis went back in time')
end
local prefix, pool, window = ARGV[3], ARGV[4], ARGV[5]
local at = 7
local answers = {}
for i = 1, tonumber(ARGV[6]) do
  local place, ref, source, offset = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  local node, job, kind, id, payload = ARGV[at + 4], ARGV[at + 5], ARGV[at + 6], ARGV[at + 7], ARGV[at + 8]
  local identity, print = ARGV[at + 9], ARGV[at + 10]
  at = at + 11
  local answer = 'already'
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
    -- A mere record of a failed attempt, which RQ's tools may have put into the queue, is no place.
    local is_there = redis.call('HGET', 'rq:job:' .. job, 'envelope')
    if redis.call('ZREM', prefix .. 'node:' .. node .. ':claimed', job) == 1 then
      redis.call('XADD', prefix .. 'node:' .. node .. ':control', 'MAXLEN', '~', 1000, '*', 'kind', 'cancel', 'job', job)
      redis.call('PEXPIRE', prefix .. 'node:' .. node .. ':control', 3600000)
      answer = 'ok'
    elseif is_there and (redis.call('LREM', 'rq:queue:' .. queue, 1, job) == 1
        or redis.call('LREM', 'rq:queue:' .. queue .. ':intermediate', 1, job) == 1
        or redis.call('ZREM', 'rq:failed:' .. queue, job) == 1) then
      answer = 'ok'
    elseif place == 'lost' then
      local low = tonumber(redis.call('HGET', KEYS[3], source) or '0')
      local taken = tonumber(offset) < low or redis.call('ZSCORE', prefix .. 'above:' .. source, offset)
      if taken and not is_there and not redis.call('ZSCORE', KEYS[4], ref) then
        answer = 'ok'
      end
    end
    if answer == 'ok' then
      redis.call('ZREM', 'rq:wip:' .. queue, job .. ':flexlb')
      redis.call('DEL', 'rq:job:' .. job)
    end
  end
  if answer == 'ok' and kind ~= 'none' then
    redis.call('XADD', KEYS[5], '*', 'kind', kind, 'ref', ref, 'id', id, 'job', job, 'payload', payload)
  end
  answers[i] = answer
end
return {redis.call('HINCRBY', KEYS[2], 'counter', 1), answers}
