#!lua flags=allow-oom
-- Prolong the leases of the jobs that an agent holds, once a second, and learn which it lost.
-- KEYS  1 node  2 claimed  3 RQ queue  4 RQ intermediate  5 RQ worker
-- ARGV  1 incarnation  2 lease ms  3 node ttl ms  4 now (ISO 8601)  5 RQ worker ttl s
--       6.. (job id held, its checkpoint or '')
-- Returns {queued ids waiting to be claimed, lost job ids...}; error FENCED as in report.
local known = redis.call('HMGET', KEYS[1], 'incarnation', 'fenced')
if known[1] ~= ARGV[1] or known[2] == ARGV[1] then
  return redis.error_reply('FENCED this incarnation is ' .. (known[1] and 'fenced' or 'unknown'))
end
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local until_ms = now + tonumber(ARGV[2])
-- A job is rebuilt from its record by the leader; one of another type, whoever made it so, is as good as none.
local function note(job, ...)
  local done = redis.pcall('HSET', job, ...)
  if type(done) ~= 'table' or not done.err then return end
  if not string.find(done.err, 'WRONGTYPE', 1, true) then error(done.err) end
  redis.call('DEL', job)
end
local answer = {redis.call('LLEN', KEYS[3]) + redis.call('LLEN', KEYS[4])}
for i = 6, #ARGV, 2 do
  if redis.call('ZSCORE', KEYS[2], ARGV[i]) then
    redis.call('ZADD', KEYS[2], until_ms, ARGV[i])
    local job = 'rq:job:' .. ARGV[i]
    if ARGV[i + 1] ~= '' and redis.call('EXISTS', job) == 1 then
      note(job, 'checkpoint', ARGV[i + 1])
    end
  else
    answer[#answer + 1] = ARGV[i]
  end
end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('HSET', KEYS[5], 'last_heartbeat', ARGV[4])
redis.call('EXPIRE', KEYS[5], ARGV[5])
return answer
