-- The start of a session with an open life, "" if it is not known. ARGV: buckets, partitions, issuer, UUID flag, sid.
open_layout(ARGV[1], ARGV[2], false)
local issuer = known(ARGV[3])
local session = issuer and get_session(make_field(issuer, SESSION, tonumber(ARGV[4]), ARGV[5]))
return session and not session.closed and pack_start(session)
