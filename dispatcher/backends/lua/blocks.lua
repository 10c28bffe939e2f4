#!lua
-- Publish changes of a node's cache view: its sets, and the stream that leaders follow.
-- KEYS  1 node  2.. cached blocks, one set per tier
-- ARGV  1 incarnation  2 node ttl ms  3 most events kept in the stream
--       4 blocks stream (no KEYS, as in register)  5 events n
--       n x (sequence, kind 'stored'|'removed'|'reset', tier (its number among those of KEYS, from 1), event (JSON),
--            hashes, 8 bytes each)
-- Returns the highest sequence applied. An event at or below it was applied before: success for a repeated
-- call. One that leaves a gap ends the call: the caller sends a reset, which may have any higher sequence,
-- and its whole view. Error FENCED as in report.
-- Deliberately without allow-oom: at maxmemory the registry stops growing, and work goes on without it.
local known = redis.call('HMGET', KEYS[1], 'incarnation', 'fenced', 'blocks_seq')
if known[1] ~= ARGV[1] or known[2] == ARGV[1] then
  return redis.error_reply('FENCED this incarnation is ' .. (known[1] and 'fenced' or 'unknown'))
end
local last = tonumber(known[3] or '0')
local at = 6
for _ = 1, tonumber(ARGV[5]) do
  local sequence, kind, tier = tonumber(ARGV[at]), ARGV[at + 1], tonumber(ARGV[at + 2])
  local event, hashes = ARGV[at + 3], ARGV[at + 4]
  at = at + 5
  if sequence > last then
    if kind == 'reset' then
      redis.call('DEL', unpack(KEYS, 2))
    elseif sequence ~= last + 1 then
      break
    else
      local command = kind == 'stored' and 'SADD' or 'SREM'
      local set = KEYS[1 + tier]
      local members = {}
      for from = 1, #hashes, 8 do
        members[#members + 1] = string.sub(hashes, from, from + 7)
        if #members == 1000 then
          redis.call(command, set, unpack(members))
          members = {}
        end
      end
      if #members > 0 then redis.call(command, set, unpack(members)) end
      redis.call('PEXPIRE', set, ARGV[2])
    end
    redis.call('XADD', ARGV[4], 'MAXLEN', '~', ARGV[3], '*', 'body', event)
    last = sequence
  end
end
redis.call('HSET', KEYS[1], 'blocks_seq', last)
return last
