"""Communication between ranks: tournament rounds, waves, peer exchange, all-to-all reference."""
