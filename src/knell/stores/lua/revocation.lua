-- One revocation. ARGV: now, id. Answers now and the revocation.
local packed = redis.call('HGET', tag .. ':v', ARGV[2])
if not packed then
  return false
end
local _, _, revocation = unpack_revocation(packed)
return {text(clock(ARGV[1])), revocation}
