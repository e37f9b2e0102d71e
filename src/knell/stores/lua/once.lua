-- Ends a script whose answer tells what this very run did (run). KEYS[2] keeps the answer for as long as the same call
-- may be sent again, because its first answer was lost.
local SECONDS = 5
local kept = redis.call('GET', KEYS[2])
if kept then
  -- A write of its own: who waits for replicas next waits for what the first run wrote.
  redis.call('EXPIRE', KEYS[2], SECONDS)
  return cmsgpack.unpack(kept)
end
local answer = run()
redis.call('SET', KEYS[2], cmsgpack.pack(answer), 'EX', SECONDS)
return answer
