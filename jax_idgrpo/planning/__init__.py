"""Memory, arithmetic and step time of every program, from the compiler."""
