# fetch.sh SUMS FOLDER REPO REVISION [what `hf download` takes more]
#
# Puts a repository's files into FOLDER where they are not there yet: all of them, each with its checksum in the file
# SUMS, or none. One pod at a time does it; the others wait, and find it done.
set -eu
sums=$1 folder=$2 repo=$3 revision=$4
shift 4
exec 9>"$(dirname "$folder")/.fetch-lock"
flock 9
if [ -e "$folder" ]; then
  if cmp -s "$sums" "$folder/.sha256"; then
    echo "$folder: there"
    exit 0
  fi
  echo "$folder: made of other files than models.fetch names now; give what is new a new name" >&2
  exit 1
fi
hf download "$repo" --revision "$revision" --local-dir "$folder.partial" "$@"
rm -rf "$folder.partial/.cache"
(
  cd "$folder.partial"
  sha256sum --check --strict --quiet "$sums"
  find . -type f ! -name .sha256 | sed 's|^\./||' | while read -r file; do
    sed 's/^[0-9a-f]*  //' "$sums" | grep -qxF "$file" && continue
    echo "$file: fetched, and models.fetch has no checksum of it" >&2
    rm "$file"
    exit 1
  done
)
cp "$sums" "$folder.partial/.sha256"
mv "$folder.partial" "$folder"
echo "$folder: fetched"
