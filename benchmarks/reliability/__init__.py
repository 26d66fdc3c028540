"""What a server does under load, faults and swaps of its catalogue."""
