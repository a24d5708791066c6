"""Model families: their attention plans, patches of their code, and facts about single families."""
