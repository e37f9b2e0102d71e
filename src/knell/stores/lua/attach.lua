-- Takes `detach` back. ARGV: buckets, partitions, issuer, UUID flag, jti, revocation id.
open_layout(ARGV[1], ARGV[2], false)
local issuer = known(ARGV[3])
local token = issuer and get_token(make_field(issuer, 0, tonumber(ARGV[4]), ARGV[5]))
if not token or token.detached == 0 then
  return 0
end
local by = redis.call('HGET', tag .. ':d', token.field)
if not by or string.sub(by, 2) ~= ARGV[6] then
  return 0
end
redis.call('HDEL', tag .. ':d', token.field)
token.detached = 0
local session = token.sid ~= '' and get_session(token.sid)
if session and session.closed and session.closer == token.field then
  session.closed, session.closer = false, ''
end
if session and not session.closed then
  session.live = session.live + 1
  token.life = session.life
  put_session(session)
end
put_token(token)
return 1
