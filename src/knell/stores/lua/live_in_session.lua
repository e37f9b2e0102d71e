-- How many live tokens an open session has. ARGV: buckets, partitions, iss, UUID, sid.
open_layout(ARGV[1], ARGV[2], false)
local number = known(ARGV[3])
local session = number and get_session(make_field(number, SESSION, tonumber(ARGV[4]), ARGV[5]))
return session and not session.closed and session.live or -1
