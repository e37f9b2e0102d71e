"""What the demo is made of: processes, clients, a ledger of what should end and what did, and a timeline."""
