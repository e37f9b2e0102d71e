-- The registered services: name, when added, since when it has missed notices ("" if it has not).
local answer = {}
local found = redis.call('HGETALL', tag .. ':s')
for i = 1, #found, 2 do
  local batch = redis.call('HGET', tag .. ':ms', found[i])
  local since = batch and redis.call('HGET', record_key(batch), 'z') or ''
  answer[#answer + 1] = {found[i], found[i + 1], since}
end
return answer
