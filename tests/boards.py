"""Sudoku by brute force, 4×4 and 9×9."""

import re


def units_of(side):
    """For each cell its row, its column and its box."""
    box = int(side**0.5)
    cells = (divmod(cell, side) for cell in range(side * side))
    return [{("row", row), ("column", column), ("box", row // box, column // box)} for row, column in cells]


def brute_force(board, most=1000):
    """
    The solutions of a board of 16 or 81 digits, 0 for a blank, in order; at most `most` of them. By trying every digit
    in the blank with the fewest choices, rules checked on the coordinates; no table, no bits.
    """
    side = {16: 4, 81: 9}[len(board)]
    units = units_of(side)
    peers = [[b for b, other in enumerate(units) if b != a and other & unit] for a, unit in enumerate(units)]
    if any(digit != "0" and digit in (board[peer] for peer in peers[cell]) for cell, digit in enumerate(board)):
        return []

    def filled(digits):
        blanks = [cell for cell, digit in enumerate(digits) if digit == "0"]
        if not blanks:
            return [digits]
        choices = {cell: set("123456789"[:side]) - {digits[peer] for peer in peers[cell]} for cell in blanks}
        cell, solved = min(blanks, key=lambda blank: len(choices[blank])), []
        for digit in sorted(choices[cell]):
            solved += filled(digits[:cell] + digit + digits[cell + 1 :]) if len(solved) < most else []
        return solved

    return sorted(filled(board)[:most])


def shown_sudokus(text):
    """The digits of all that reads as a sudoku to solve."""
    return re.findall(r"[Ss]udoku:?\s+(\d{6,})", text)
