#!/bin/bash
# A commit-msg hook: the subject has 1 to 72 characters and no full stop, and a blank line follows it.
set -euo pipefail
subject=$(grep -v '^#' "$1" | sed -n 1p)
second=$(grep -v '^#' "$1" | sed -n 2p)
if [ "${#subject}" -lt 1 ] || [ "${#subject}" -gt 72 ]; then
  echo "commit subject: ${#subject} characters, has to have 1 to 72; put reasons in the body" >&2
  exit 1
fi
case $subject in *.) echo "commit subject: ends with a full stop; remove it" >&2; exit 1 ;; esac
if [ -n "$second" ]; then
  echo "commit message: leave the second line empty, the body starts on the third" >&2
  exit 1
fi
