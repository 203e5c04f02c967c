"""The commands of the product, a file each: arguments in, one call, a readable result out."""
