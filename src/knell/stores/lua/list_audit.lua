-- Entries of the audit log, the latest first. ARGV: when and id of the one before the first ("" for none), limit.
local at, id, limit = ARGV[1], ARGV[2], tonumber(ARGV[3])
local answer = {}
local function take(ids)
  for _, found in ipairs(ids) do
    if #answer < limit then
      answer[#answer + 1] = redis.call('HGET', tag .. ':ae', found)
    end
  end
end
if at ~= '' then
  -- Those of the same moment: the set has them in the order of their ids.
  local before = {}
  for _, found in ipairs(redis.call('ZREVRANGEBYSCORE', tag .. ':ai', at, at)) do
    if found < id then
      before[#before + 1] = found
    end
  end
  take(before)
  at = '(' .. at
end
take(redis.call('ZREVRANGEBYSCORE', tag .. ':ai', at == '' and '+inf' or at, '-inf', 'LIMIT', 0, limit))
return answer
