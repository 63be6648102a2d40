"""Speed beside other implementations: each module measures one claim in one run and checks that both sides work."""
