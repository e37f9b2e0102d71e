-- A service's record of a batch: :k:<service>:<batch> with h holder, u end of its lease, d and p bitmaps of what is done
-- and parked; :kx the records by when they leave.
local function keep(key, now, lifetime)
  redis.call('ZADD', tag .. ':kx', text(now + lifetime), string.sub(key, #tag + 4))
end
