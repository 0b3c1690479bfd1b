"""Decodes image files with CRIU's library, as `crit decode` does, and encodes them again as `crit encode` does.

Names of files come on standard input; what is found out goes to standard output as JSON:
  files    how many files were decoded
  same     how many of them came back byte for byte, with nothing lost
  unknown  fields that the library passes over: [message, number]
  magics   kinds that it does not know, with the names of the files: [magic, file]
  broken   files that it can't read, or that come back different even from what it knows of them: [file, why]
"""
import io
import json
import os
import struct
import sys

from pycriu.images import images, pb


def note_unknown(message, found):
    found.update((message.DESCRIPTOR.name, field.field_number) for field in message.UnknownFields())
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in value if field.label == field.LABEL_REPEATED else [value]:
                note_unknown(part, found)


def known(data, found):
    """The file without the fields that the library does not know, which is what it can give back."""
    f = io.BytesIO(data)
    handler = rhandler(f)[1]
    out = io.BytesIO(data[:f.tell()])
    out.seek(0, os.SEEK_END)
    ghost = isinstance(handler, images.ghost_file_handler)
    if ghost:
        kinds = [pb.ghost_file_entry, pb.ghost_chunk_entry]
    elif isinstance(handler, images.pagemap_handler):
        kinds = [pb.pagemap_head, pb.pagemap_entry]
    else:
        kinds = [handler.payload]
    while head := f.read(4):
        message = kinds[0]()
        kinds = kinds[1:] or kinds
        message.ParseFromString(f.read(struct.unpack("i", head)[0]))
        note_unknown(message, found)
        message.DiscardUnknownFields()
        encoded = message.SerializeToString()
        out.write(struct.pack("i", len(encoded)) + encoded)
        start = f.tell()
        extra = None if ghost else getattr(handler, "extra_handler", None)
        if ghost:
            # The file's own message is followed by all of its contents, or by pieces.
            whole = isinstance(message, pb.ghost_file_entry) and not message.chunks
            f.seek(0, os.SEEK_END) if whole else f.seek(getattr(message, "len", 0), os.SEEK_CUR)
        elif extra:
            extra.skip(f, message)
        out.write(data[start:f.tell()])
    return out.getvalue()


def rhandler(f):
    return getattr(images, "__rhandler")(f)


def main():
    unknown, magics, broken, files, same = set(), [], [], 0, 0
    for path in sys.stdin.read().splitlines():
        with open(path, "rb") as file:
            data = file.read()
        try:
            decoded = images.load(io.BytesIO(data))
        except images.MagicException as error:
            magics.append([error.magic & 0xFFFFFFFF, path])
            continue
        except Exception as error:
            broken.append([path, f"decode: {error!r}"])
            continue
        files += 1
        try:
            # Through text, as between the two commands.
            again = images.dumps(json.loads(json.dumps(decoded)))
            expected = known(data, unknown)
        except Exception as error:
            broken.append([path, f"encode: {error!r}"])
            continue
        # A name that is not UTF-8 is no string to `known`, but comes back all the same.
        if again != expected and images.load(io.BytesIO(again)) != decoded:
            broken.append([path, f"{len(again)} bytes come back, not the same as {len(expected)}"])
        same += again == data
    json.dump({"files": files, "same": same, "unknown": sorted(unknown), "magics": magics, "broken": broken}, sys.stdout)


main()
