"""Other projects' signatures over our attention, and nothing else: arguments are checked and converted here, once."""
