#!lua flags=allow-oom
-- End attempts: store outcomes, or hand failed and unfinished ones back to the leader.
-- KEYS  1 node  2 claimed  3 RQ wip
-- ARGV  1 incarnation  2 closing (no KEYS, as in register)  3 items n
--       n x (job id, kind 'outcome'|'failed'|'released'|'handoff', ref, request id, payload,
--            checkpoint or '')
--       payload: the outcome, the failed attempt, or what a prefill stage hands over
-- Returns one answer per item: 'ok', or 'lost' when this attempt is not (or no longer) held here;
-- error FENCED as in report. Accepted only from the current (incarnation, attempt): the claimed
-- entry names both, and removing it is what entitles the effect.
local known = redis.call('HMGET', KEYS[1], 'incarnation', 'fenced')
if known[1] ~= ARGV[1] or known[2] == ARGV[1] then
  return redis.error_reply('FENCED this incarnation is ' .. (known[1] and 'fenced' or 'unknown'))
end
-- A job is rebuilt from its record by the leader; one of another type, whoever made it so, is as good as none.
local function note(job, ...)
  local done = redis.pcall('HSET', job, ...)
  if type(done) ~= 'table' or not done.err then return end
  if not string.find(done.err, 'WRONGTYPE', 1, true) then error(done.err) end
  redis.call('DEL', job)
end
local at = 4
local answers = {}
for i = 1, tonumber(ARGV[3]) do
  local job, kind, ref, id, payload = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
  local checkpoint = ARGV[at + 5]
  at = at + 6
  if redis.call('ZREM', KEYS[2], job) == 1 then
    redis.call('XADD', ARGV[2], '*', 'kind', kind, 'ref', ref, 'id', id, 'job', job, 'payload', payload)
    redis.call('ZREM', KEYS[3], job .. ':flexlb')
    if kind == 'outcome' then
      redis.call('DEL', 'rq:job:' .. job)
    else
      note('rq:job:' .. job, 'status', 'deferred')
      if checkpoint ~= '' then note('rq:job:' .. job, 'checkpoint', checkpoint) end
    end
    answers[i] = 'ok'
  else
    answers[i] = 'lost'
  end
end
return answers
