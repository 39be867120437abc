//! What holds for every walk, whatever it reads.
