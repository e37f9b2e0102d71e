-- Stops counting a token as live. ARGV: buckets, partitions, issuer, UUID flag, jti, revocation id.
-- Answers whether that ended its session, its field, its record, and the strings that they refer to.
open_layout(ARGV[1], ARGV[2], false)
local issuer = known(ARGV[3])
local token = issuer and get_token(make_field(issuer, 0, tonumber(ARGV[4]), ARGV[5]))
if not token then
  return false
end
local revocation = ARGV[6]
local ends = 0
if token.detached == 1 then
  local by = redis.call('HGET', tag .. ':d', token.field)
  if by and string.sub(by, 2) == revocation then
    ends = tonumber(string.sub(by, 1, 1))
  end
else
  local session = token.sid ~= '' and get_session(token.sid)
  if is_live_in(token, session) then
    session.live = session.live - 1
    if session.live == 0 and session.due == 0 then
      session.closed, session.closer, ends = true, token.field, 1
    end
    put_session(session)
  end
  token.detached = 1
  put_token(token)
  redis.call('HSET', tag .. ':d', token.field, ends .. revocation)
end
local names = {}
name_strings(names, issuer, token.client, token.kid)
return {ends, token.field, token.packed, pack_strings(names)}
