-- Adds an entry to the audit log. ARGV: id, when, the entry.
note(ARGV[1], ARGV[2], ARGV[3])
return 1
