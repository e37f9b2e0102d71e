-- Takes `detach` back. ARGV: buckets, partitions, issuer, UUID flag, jti, revocation id.
open_layout(ARGV[1], ARGV[2], false)
local issuer = known(ARGV[3])
local token = issuer and get_token(make_field(issuer, 0, tonumber(ARGV[4]), ARGV[5]))
local by = token and token.detached == 1 and redis.call('HGET', tag .. ':d', token.field)
if not by or string.sub(by, 2) ~= ARGV[6] then
  return 0
end
redis.call('HDEL', tag .. ':d', token.field)
token.detached = 0
local session = token.sid ~= '' and get_session(token.sid)
if has_closed(token, session) then
  session.closed, session.closer = false, ''
end
-- A life that was opened since this detach closed the token's own is joined; any other is none of the token's.
local joins = session and (token.life == session.life or string.sub(by, 1, 1) == '1')
if joins and not session.closed then
  session.live = session.live + 1
  if not session.has_exp and token.second > math.ceil(session.ending) then
    -- It was moved while it was detached. Its exact exp is not known here: up to a second late, and never early.
    session.ending = token.second
  end
  put_session(session)
  token.life = session.life
end
put_token(token)
return 1
